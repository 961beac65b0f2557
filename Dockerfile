# Not built yet: no Docker engine was at hand where this was written.
# Build: docker build -t calmix .
# Use:   docker run --rm -v "$PWD:/work" calmix compress builtin:smollm2-135m -o out --effort quick
# On Linux pip takes the CUDA build of PyTorch; for the smaller one for CPUs name an index that has
# it: --build-arg TORCH="--index-url ADDRESS torch". For an accelerator start from an image of its
# vendor's that has PyTorch.
FROM python:3.12-slim

ARG TORCH=torch>=2.9
COPY pyproject.toml README.md LICENSE /src/
COPY calmix /src/calmix
RUN pip install --no-cache-dir $TORCH \
 && pip install --no-cache-dir /src \
 && rm -rf /src

# Nothing runs as root; models and archives are kept in the cache, which a volume may hold.
RUN useradd --create-home calmix && mkdir /work && chown calmix /work
USER calmix
ENV CALMIX_CACHE=/home/calmix/cache
WORKDIR /work
ENTRYPOINT ["calmix"]
CMD ["--help"]

# Not built yet.
# Build: docker build -t calmix .
# Use:   docker run --rm -v "$PWD:/work" calmix compress builtin:smollm2-135m -o out --effort quick
# pip installs the CUDA build of PyTorch. For the smaller CPU build, name an index that has it:
# --build-arg TORCH="--index-url ADDRESS torch". For an accelerator, start from its vendor's image.
FROM python:3.12-slim

ARG TORCH=torch>=2.9
COPY pyproject.toml README.md LICENSE /src/
COPY calmix /src/calmix
RUN pip install --no-cache-dir $TORCH \
 && pip install --no-cache-dir /src \
 && rm -rf /src

# Nothing runs as root. Mount a volume at the cache to keep models and archives.
RUN useradd --create-home calmix && mkdir /work && chown calmix /work
USER calmix
ENV CALMIX_CACHE=/home/calmix/cache
WORKDIR /work
ENTRYPOINT ["calmix"]
CMD ["--help"]

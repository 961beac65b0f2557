"""A model in the form that others run or fetch: packs, GGUF, OpenVINO."""

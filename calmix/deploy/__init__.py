"""Models in other formats: lossless packs, GGUF and OpenVINO exports."""

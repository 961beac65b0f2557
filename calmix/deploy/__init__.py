"""Models in other formats: lossless packs and GGUF."""

"""Whether what is here can be relied on: this installation, an artefact, and making it again."""

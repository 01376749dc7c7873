"""LLaMA 3 from nothing: each module is built by the notebook that its first line names."""

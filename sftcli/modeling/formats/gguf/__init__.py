"""GGUF files: a header read, a file turned into a model folder, and a model written for llama.cpp, a row for each family."""

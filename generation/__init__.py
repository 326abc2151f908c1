"""What decodes: the engine, the decoder, its caches and kernels."""

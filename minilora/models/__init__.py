"""The base model: found, loaded, identified, quantized, made trainable."""

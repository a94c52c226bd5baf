"""speedbench: measures speculative decoding inside the engine, from stored records alone."""

__version__ = "0.1.0"

"""The device-planned engine: who is resident is decided on the GPU, without asking the host."""

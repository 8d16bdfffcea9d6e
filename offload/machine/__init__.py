"""`offload doctor`: this machine, looked at with this program's eyes."""

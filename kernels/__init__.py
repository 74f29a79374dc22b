"""The Triton kernels. A module here imports triton: only the backend that launches it imports the module."""

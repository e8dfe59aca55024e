"""Multi-device and multi-process runs: meshes, shardings, transfers, joining and exiting."""

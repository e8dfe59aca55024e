"""Many devices and processes: meshes, shardings, transfers; how processes join and end."""

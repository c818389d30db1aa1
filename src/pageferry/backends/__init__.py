"""What stands behind a guest's devices on this host: files, taps, sockets. Devices are handed them."""

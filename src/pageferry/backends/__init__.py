"""A guest's disks and networks on this host: files, taps, sockets; handed to its devices."""

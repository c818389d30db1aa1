"""The process around a guest: choosing a machine, the QMP control socket, running and receiving guests, the doctor."""

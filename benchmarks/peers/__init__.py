"""Two virtual machine monitors that move the same guest, driven and measured from outside in the same way."""

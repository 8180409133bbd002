"""What joins a KernelWarehouse network to MMEngine's runner."""

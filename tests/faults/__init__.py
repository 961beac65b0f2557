"""Fault injection: kills, interrupts, full and read-only disks, a second process."""

"""What a night can bring: kills, interrupts, full and read-only disks, a second process."""

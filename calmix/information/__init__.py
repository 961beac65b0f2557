"""What a calibration set is like: metrics of its ids, at one token budget."""

from calmix.information.measuring import Interval, Measured, Measurement, measure

__all__ = ["Interval", "Measured", "Measurement", "measure"]

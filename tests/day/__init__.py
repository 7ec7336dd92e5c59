"""A day's work in an hour: conversions of many kinds, one after the other, and everything that goes wrong on a day."""

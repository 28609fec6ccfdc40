"""Packaged presets: `model/`, `corpus/` and `search/` hold the values that a sweep file may call by name."""

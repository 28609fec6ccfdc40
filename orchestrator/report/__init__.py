"""A sweep as one HTML page that needs neither network nor this program."""

"""Compressed models in the formats that other programs read, with the codes that are stored here."""

"""The stages of the production line, one module each, and what they share."""

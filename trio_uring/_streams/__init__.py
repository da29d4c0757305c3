"""Trio's sockets and streams on the ring."""

"""Attacks on the system, run as an attacker would: what holds and what gives is measured, not argued."""

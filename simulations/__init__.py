"""Whole federations on one machine: the plain loop, the launcher of the real engine, comparisons, audits."""

"""What a machine needs to join: keys and certificates, the files of a deployment, and a doctor that looks before the start."""


class KitError(ValueError):
    """A deployment that cannot be made or read: one line that says what must hold, what was got and what to do."""

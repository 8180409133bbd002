"""What reading a checkpoint file can end in, and how words of a file are shown."""


class UnsafeCheckpointError(RuntimeError):
    """A file that names objects beyond tensors, plain data and MMEngine's records."""


class DamagedCheckpointError(RuntimeError):
    """A file that is truncated or altered, or no checkpoint at all."""


class CheckpointMismatchError(RuntimeError):
    """A checkpoint for another network or budget; names what differs and what would fit."""


def shown(word: object, length: int = 200) -> str:
    """A word of a file for a message: ASCII on one line, of a bounded length.

    Args:
        word: Text, or what the message will name by its type: spelling it out may take for ever.
        length: How many characters are kept.
    """
    if not isinstance(word, str):
        return f'a value of type {type(word).__name__}'
    text = word[:length].encode('ascii', 'backslashreplace').decode()
    return ''.join(char if char.isprintable() else repr(char)[1:-1] for char in text)

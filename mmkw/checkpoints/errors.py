"""The errors of reading checkpoint files, and how messages show text from a file."""


class UnsafeCheckpointError(RuntimeError):
    """A file that names objects other than tensors, plain data and MMEngine's records."""


class DamagedCheckpointError(RuntimeError):
    """A file that is truncated or altered, or that is not a checkpoint."""


class CheckpointMismatchError(RuntimeError):
    """A checkpoint for another network or budget. The message names what differs."""


def shown(word: object, length: int = 200) -> str:
    """Makes text from a file safe for a message: ASCII on one line, of limited length.

    Args:
        word: Text. For other values the result only names the type, because their text may be
            extremely long.
        length: How many characters are kept.
    """
    if not isinstance(word, str):
        return f'a value of type {type(word).__name__}'
    text = word[:length].encode('ascii', 'backslashreplace').decode()
    return ''.join(char if char.isprintable() else repr(char)[1:-1] for char in text)

"""MMEngine's checkpoint files: read as data, written whole, resumed after any interruption.

Both modules here take the place of MMEngine's own as soon as that is imported (``mmkw.autoload``).
They import of mmkw and of MMEngine only what is there at that moment.
"""

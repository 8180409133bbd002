"""``python -m mmkw`` is the command ``mmkw``."""

from .cli import main

if __name__ == '__main__':
    main()

"""The version of mmkw."""

__version__ = '0.1.0'

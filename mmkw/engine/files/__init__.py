"""MMEngine's checkpoint files: read as data, written whole, resumed after any interruption.

``schemes`` and ``hook`` replace parts of MMEngine as soon as these are imported
(``mmkw.autoload``). At that moment other modules of MMEngine and mmkw may be incomplete. So
functions here import such modules only when they are called.
"""

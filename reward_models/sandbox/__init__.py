"""Two confined processes: ``program`` runs a submitted program, ``checker`` runs its tests.

Both use the standard library only and are started by ``code_runner``. They are connected by a
``channel`` that carries plain data (``plain``); ``confinement`` restricts each of them.
"""

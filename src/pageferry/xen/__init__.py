"""Real Xen, driven from its dom0 without its libraries: hypercalls, log-dirty, foreign memory, saving a domain.

``uapi`` is transcription only. ``hypercall`` has the device, ``domctl`` what Xen is asked, ``foreign`` a domain's
memory, ``store`` Xen's store. ``log`` is a :class:`~pageferry.core.vm.LogDirty`, ``domain`` a
:class:`~pageferry.core.vm.Vm`. ``undo_log`` undoes what a killed process left behind. ``save`` writes what
``xl restore`` takes; ``missed`` proves it.
"""

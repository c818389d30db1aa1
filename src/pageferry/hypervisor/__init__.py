"""The RFC's hypervisor in software: nested paging, log-dirty and the faults between them, with Unicorn as the CPU.

Read along with the RFC in this order: :mod:`.p2m` (the table whose entries turn NOT WRITABLE), :mod:`.npf` (the nested
page fault), :mod:`.paging` (the four operators, ``mark_dirty``, and what nested paging does for them),
:mod:`.locks` (the order that the RFC asks for). Around them: :mod:`.machine` (machine frames), :mod:`.guest_walk` (the
guest's own page tables), :mod:`.nested_mmu`, :mod:`.mmio`, :mod:`.domain` and :mod:`.audit`. The same log-dirty without
nested paging, by other operations behind the same dispatch: :mod:`.shadow` and :mod:`.shadow_mmu`, over
:mod:`.shadow_tables`.

The CPU begins at :mod:`.cpu`: exceptions and interrupts (:mod:`.exceptions`, :mod:`.pending_events`), ways into a
kernel (:mod:`.system_calls`), ports (:mod:`.port_io`), state (:mod:`.registers`), and how Unicorn is handled
(:mod:`.unicorn_api`, :mod:`.unicorn_cpu`, :mod:`.countdown`, :mod:`.tlb_memory`).

``examples/rfc_tour.py`` shows it at work.
"""

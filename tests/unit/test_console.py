import os
import threading

from pageferry.vmm.console import ConsoleOutput


def test_output_comes_out_in_order():
    reader, writer = os.pipe()
    console = ConsoleOutput(os.fdopen(writer, "wb"))
    for byte in b"hello":
        console(bytes([byte]))
    console.close()
    assert os.read(reader, 100) == b"hello"
    os.close(reader)


def test_neither_a_full_pipe_nor_a_closed_one_blocks_or_raises():
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "wb")
    console = ConsoleOutput(stream)
    done = threading.Event()

    def talk():
        for _ in range(200_000):
            console(b"x" * 10)
        done.set()

    threading.Thread(target=talk, daemon=True).start()
    assert done.wait(60)
    os.close(reader)
    console(b"anybody?")
    console.close()

/* echo: polls the UART and answers each line that comes with its number and itself, as "3: text". A line ends with a
 * carriage return or a line feed, and is cut after 255 bytes. An operation is one look at the receiver.
 *
 * Errors: 1 the receiver overran (lines, bytes), which flow control on the line rules out.
 * Status values: lines, bytes received. */
#include "guest.h"

#define DATA (CONSOLE_PORT + 0)
#define FIFO_CONTROL (CONSOLE_PORT + 2)
#define LINE_STATUS (CONSOLE_PORT + 5)
#define FIFO_ENABLE 1
#define DATA_READY 1
#define OVERRUN 2
#define POLL_US 1000

static u64 run(const struct info *info, u64 cpu, struct status *status) {
    char line[256];
    u64 length = 0;
    if (!cpu)
        out8(FIFO_CONTROL, FIFO_ENABLE); /* before it is announced: this drops what was typed */
    announce("echo", info, cpu);
    if (cpu)
        return rest(status);
    for (;; status->work++) {
        u8 ready = in8(LINE_STATUS);
        if (ready & OVERRUN)
            return fail(status, 1, status->values[0], status->values[1], 0, ready);
        if (!(ready & DATA_READY)) {
            out32(CLOCK_PORT, POLL_US);
            continue;
        }
        u8 byte = in8(DATA);
        status->values[1]++;
        if (byte == '\r' || byte == '\n') {
            line[length] = 0;
            print_number(++status->values[0]);
            print(": ");
            print(line);
            print("\n");
            length = 0;
        } else if (length < sizeof line - 1)
            line[length++] = (char)byte;
    }
}

# The first process of the guests that `make linux-image` makes: it mounts what programs expect, loads the modules,
# has the power button switch the guest off, says that it is ready, and then does what the kernel's command line asks for:
#   root=/dev/vda    go on in the root file system there, with its /sbin/init or what init= names
#   pageferry=work   work that checks itself, for ever (/bin/work)
#   else             a shell on the console, and another when that ends
export PATH=/bin HOME=/ TERM=linux
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
for module in /modules/*; do insmod "$module"; done
ip link set lo up
root= init=/sbin/init
for word in $(cat /proc/cmdline); do
    case "$word" in
        root=*) root=${word#root=} ;;
        init=*) init=${word#init=} ;;
    esac
done
if [ -n "$root" ]; then mount "$root" /root && exec switch_root /root "$init"; fi
mkdir -p /etc/acpi/PWRF
printf '#!/bin/sh\npoweroff -f\n' >/etc/acpi/PWRF/00000080
chmod +x /etc/acpi/PWRF/00000080
acpid -l /dev/null
echo "pageferry: ready"
case " $(cat /proc/cmdline) " in
    *" pageferry=work "*) work ;;
esac
while :; do setsid cttyhack sh; done

#!/bin/sh
# Runs one built guest in QEMU, the second opinion while guests are written.
#
#   guests/small/run.sh IMAGE [tcg|kvm] [further QEMU options]
#
# The exit status is the guest's: 33 pass, 35 fail, 124 no end within 60 seconds.
image=${1:?usage: run.sh IMAGE [tcg|kvm] [options]}
accel=${2:-tcg}
shift
[ $# -gt 0 ] && shift
cpu=max
[ "$accel" = kvm ] && cpu=host,-arch-capabilities
exec timeout 60 qemu-system-x86_64 -accel "$accel" -cpu "$cpu" -kernel "$image" -smp 4 -m 64 \
    -no-reboot -device isa-debug-exit,iobase=0xf4,iosize=4 -serial stdio -display none \
    -monitor none "$@"

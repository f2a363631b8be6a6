#!/bin/busybox sh
# The lab's first program: from the initial RAM filesystem to a root that may be written, and back.
B=/bin/busybox
$B mkdir -p /proc /sys /dev /low /up /new
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
for m in $($B cat /modules.list); do $B insmod "/modules/$m"; done
$B mount -t squashfs -o ro /dev/vda /low || exec $B sh
$B mount -t tmpfs -o mode=0755 up /up
$B mkdir -p /up/upper /up/work
$B mount -t overlay -o lowerdir=/low,upperdir=/up/upper,workdir=/up/work root /new
for d in proc sys dev; do $B mount -o move /$d /new/$d; done
$B mkdir -p /new/lab /new/lab-out /new/state
exec $B switch_root /new /bin/sh -c '
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux
nine=trans=virtio,version=9p2000.L,msize=524288
mount -t 9p -o "ro,cache=loose,$nine" lab /lab
mount -t 9p -o "$nine" out /lab-out
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout; ln -s fd/2 /dev/stderr
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=0620,ptmxmode=0666 devpts /dev/pts
for d in /tmp /run /dev/shm; do mount -t tmpfs -o mode=1777 tmpfs $d; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
modprobe -a kvm_amd tun bridge vhost_net vhost_vsock loop
chmod 0666 /dev/kvm
# What is open as long as the lab is. The kernel changes its own code (static keys, one of them in the
# scheduler) with the first and the last microVM, and with the first and the last chain at each hook of
# the firewall. QEMU, which emulates this machine, may translate that code for one processor while
# another one changes it, which then runs the breakpoint of the change for ever (seen in 7.2: a write
# between reading code and protecting it goes unseen).
qemu-system-x86_64 -S -M microvm -accel kvm -m 8M -nodefaults -display none </dev/null >/dev/null 2>&1 &
rules=
for family in inet bridge; do
  rules="$rules add table $family held;"
  for hook in prerouting input forward output postrouting; do
    rules="$rules add chain $family held $hook { type filter hook $hook priority 0; };"
  done
done
nft "$rules"
ip link set lo up
echo lab > /proc/sys/kernel/hostname
cd /root
# Guests run on all processors but the first: see PROCESSORS in machine.rs.
setsid -c taskset -c 1-2 sh /lab/run.sh </dev/console >/dev/console 2>&1
sync
busybox poweroff -f'

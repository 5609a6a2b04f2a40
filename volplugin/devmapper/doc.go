// Package devmapper works on device-mapper devices through the ioctls of
// /dev/mapper/control, without libdevmapper, dmsetup or udev.
//
// # Without udev
//
// A plugin's container has no udev and a /dev of its own, so nobody makes device
// nodes there. A Client makes them in a directory of its own, one for each device,
// with the device's name. On the host udev hears of the devices too. It is told by
// flags to leave them alone, so that it makes no links and does not open them,
// which would hinder their removal; and it is given no cookie, so that nobody
// waits for it.
//
// # Sectors
//
// Lengths and places in tables are in sectors of 512 bytes, whatever the sectors of
// the devices are.
//
// The package knows the tables and the status lines of thin pools and thin
// devices, but no volumes, pools of Berth's or file systems. Device names are the
// host's, whoever makes them: there are no namespaces of device-mapper.
package devmapper

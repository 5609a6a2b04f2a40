package link

import (
	"net"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The netlink library needs up to five messages, each under the kernel's one lock
// for links, for what fits in one; and it cannot set a forward delay.

// create makes a link, down. The kernel takes the group, MAC and master from this
// message, but not the alias.
func (h *Handle) create(name string, mac net.HardwareAddr, mtu, master int, info *nl.RtAttr) error {
	return h.createOn(0, name, mac, mtu, master, info)
}

// createOn is create for a link on top of another one, by its index.
func (h *Handle) createOn(parent int, name string, mac net.HardwareAddr, mtu, master int, info *nl.RtAttr) error {
	req := h.request(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
	if mac != nil {
		req.AddData(nl.NewRtAttr(unix.IFLA_ADDRESS, mac))
	}
	if mtu != 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu))))
	}
	if master != 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(master))))
	}
	if parent != 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_LINK, nl.Uint32Attr(uint32(parent))))
	}
	req.AddData(info)
	return h.execute(req)
}

func bridgeInfo() *nl.RtAttr {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
	data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	data.AddRtAttr(nl.IFLA_BR_STP_STATE, nl.Uint32Attr(0))
	data.AddRtAttr(nl.IFLA_BR_FORWARD_DELAY, nl.Uint32Attr(0))
	return info
}

// kindInfo makes a link of a kind that has no settings.
func kindInfo(kind string) *nl.RtAttr {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated(kind))
	return info
}

func vethInfo(peer string, mac net.HardwareAddr, mtu int) *nl.RtAttr {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	other := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(other, unix.AF_UNSPEC)
	other.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(peer))
	if mac != nil {
		other.AddRtAttr(unix.IFLA_ADDRESS, mac)
	}
	if mtu != 0 {
		other.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(mtu)))
	}
	return info
}

// A change lists what one message sets on a link that exists; zero fields stay
// as they are.
type change struct {
	alias  string
	mtu    int
	mac    net.HardwareAddr
	master int
	up     bool
	// port is of the bridge that the link is a port of already.
	port *Port
}

func (h *Handle) change(index int, c change) error {
	kind := unix.RTM_SETLINK
	if c.port != nil {
		// The one message that sets a port along with the link. Without NLM_F_CREATE
		// it makes nothing.
		kind = unix.RTM_NEWLINK
	}
	req := h.request(kind, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	if c.up {
		msg.Flags, msg.Change = unix.IFF_UP, unix.IFF_UP
	}
	req.AddData(msg)
	if c.alias != "" {
		req.AddData(nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(c.alias)))
	}
	if c.mtu != 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(c.mtu))))
	}
	if c.mac != nil {
		req.AddData(nl.NewRtAttr(unix.IFLA_ADDRESS, c.mac))
	}
	if c.master != 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(c.master))))
	}
	if c.port != nil {
		req.AddData(c.port.info())
	}
	return h.execute(req)
}

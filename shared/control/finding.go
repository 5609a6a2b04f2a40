package control

// A Status is how bad a Finding is.
type Status string

// The statuses, from good to bad.
const (
	// StatusOK: as it should be.
	StatusOK Status = "ok"
	// StatusWarn: works, but not all of it, or not for long.
	StatusWarn Status = "warn"
	// StatusFail: something that Berth is for does not work.
	StatusFail Status = "fail"
)

// A Finding is the result of one check of the host.
type Finding struct {
	// ID names the check for scripts: lower-case words joined by hyphens, the
	// same in all versions ("forward-policy"). One check may have several
	// findings.
	ID     string
	Status Status
	// Summary is one line without a full stop: what was found, with the value
	// that was read ("the FORWARD policy of iptables is DROP").
	Summary string
	// Detail says, in sentences, what follows from it; "" where that is plain.
	Detail string `json:",omitempty"`
	// Cure is the command that puts it right, for a root shell on the host, one
	// per line; "" when nothing is wrong or no command helps.
	Cure string `json:",omitempty"`
}

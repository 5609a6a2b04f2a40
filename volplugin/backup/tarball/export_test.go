package tarball

// For tests outside of the package.
var (
	ParseACL = parseACL
	ACLText  = aclText
)

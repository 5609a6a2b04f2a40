package link

// LimitError is what a user reads when the kernel cannot limit a rate.
var LimitError = limitError

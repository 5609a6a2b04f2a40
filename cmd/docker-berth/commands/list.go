package commands

import (
	"context"
	"io"
	"strings"
	"time"

	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/cli/cli/flags"
	"github.com/docker/cli/opts"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/berth-plugin/berth/shared/control"
)

// listOptions are the flags of commands that print a list.
type listOptions struct {
	quiet, noTrunc bool
	format         string
	filter         opts.FilterOpt
	// keys that can be filtered by.
	keys []string
}

// install adds the flags. quiet is the help of -q, example one of a filter, whose
// keys are keys; without keys there is no filter.
func (o *listOptions) install(cmd *cobra.Command, quiet, example string, keys ...string) {
	o.keys, o.filter = keys, opts.NewFilterOpt()
	set := cmd.Flags()
	set.BoolVarP(&o.quiet, "quiet", "q", false, quiet)
	set.BoolVar(&o.noTrunc, "no-trunc", false, "Do not truncate the output")
	set.StringVar(&o.format, "format", "", flags.FormatHelp)
	if len(keys) > 0 {
		set.VarP(&o.filter, "filter", "f", `Filter output based on conditions provided (e.g. "`+example+`"); keys: `+strings.Join(keys, ", "))
	}
}

// filters returns the filters. The error names an unknown key.
func (o *listOptions) filters() (filters.Args, error) {
	known := make(map[string]bool, len(o.keys))
	for _, key := range o.keys {
		known[key] = true
	}
	args := o.filter.Value()
	return args, args.Validate(known)
}

// filtered returns the filters and a client of the daemon that is asked for the list.
// A wrong filter is told before one is looked for.
func (a *app) filtered(ctx context.Context, o *listOptions, service string) (filters.Args, *control.Client, error) {
	args, err := o.filters()
	if err != nil {
		return args, nil, err
	}
	client, err := a.connect(ctx, service)
	return args, client, err
}

// A layout is how a list looks when the user does not say.
type layout struct {
	table, quiet string
	header       formatter.SubHeaderContext
}

// write prints rows.
func (o *listOptions) write(out io.Writer, l layout, rows []formatter.SubContext) error {
	format := o.format
	switch {
	case format != "" && format != formatter.TableFormatKey:
	case o.quiet:
		format = l.quiet
	default:
		format = "table " + l.table
	}
	ctx := formatter.Context{Output: out, Format: formatter.Format(format), Trunc: !o.noTrunc}
	return ctx.Write(&formatter.HeaderContext{Header: l.header}, func(write func(formatter.SubContext) error) error {
		for _, row := range rows {
			if err := write(row); err != nil {
				return err
			}
		}
		return nil
	})
}

// id is an ID as the user wants it.
func (o *listOptions) id(id string) string {
	if o.noTrunc {
		return id
	}
	return formatter.TruncateID(id)
}

// ago is a time as tables show it; "" for the zero time.
func ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return units.HumanDuration(time.Since(t)) + " ago"
}

// until is a time to come as tables show it; "" for the zero time.
func until(t time.Time) string {
	if left := time.Until(t); !t.IsZero() && left > 0 {
		return "in " + strings.ToLower(units.HumanDuration(left))
	}
	return ago(t)
}

// at is a time as templates and JSON show it; "" for the zero time.
func at(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Format(time.RFC3339)
}

// named is a name, or the ID of something that has none.
func named(name, id string) string {
	if name != "" {
		return name
	}
	return formatter.TruncateID(id)
}

// matches reports whether the object with this ID and name passes the filters
// "id" and name, where an ID may be the beginning of one and a name a part of one.
func matches(args filters.Args, key, id, name string) bool {
	return args.Match(key, name) || id != "" && args.FuzzyMatch(key, id)
}

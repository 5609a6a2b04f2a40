package firewall

import (
	"fmt"
	"iter"
	"slices"
	"strings"
)

// text shows the tables that the networks and endpoints lead to, in the words of
// `nft list`: ip and then ip6.
func text(e example) string {
	var b strings.Builder
	for _, v6 := range []bool{false, true} {
		newTable(v6).write(&b, rulesetOf(e, v6).elements)
	}
	return b.String()
}

func rulesetOf(e example, v6 bool) *ruleset {
	r := newRuleset(v6)
	for _, n := range e.networks {
		r.put(n)
		for _, ep := range e.endpoints {
			if ep.Bridge != n.Bridge {
				continue
			}
			for _, x := range r.ports(ep, len(n.Trusted) > 0) {
				r.set(x.set, x.member, x.value)
			}
		}
	}
	r.setForeignBridges(e.foreign)
	return r
}

// ordered are the sets as they are shown.
func (r *ruleset) ordered() iter.Seq2[setName, members] {
	return func(yield func(setName, members) bool) {
		for _, name := range setNames() {
			if !yield(name, r.elements[name]) {
				return
			}
		}
	}
}

func (t table) write(b *strings.Builder, e elements) {
	fmt.Fprintf(b, "table %s %s {\n", t.keyword, TableName)
	for _, name := range setNames() {
		t.writeSet(b, name, e[name])
	}
	for i, c := range t.chains {
		if i > 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(b, "\tchain %s {\n", c.name)
		if c.text != "" {
			fmt.Fprintf(b, "\t\t%s\n", c.text)
		}
		for _, r := range c.rules {
			fmt.Fprintf(b, "\t\t%s\n", r.text)
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
}

func (t table) writeSet(b *strings.Builder, name setName, have members) {
	s := t.set(nil, name)
	kind, types := "set", s.KeyType.Name
	if s.IsMap {
		kind, types = "map", types+" : "+s.DataType.Name
	}
	fmt.Fprintf(b, "\t%s %s {\n\t\ttype %s\n", kind, name, types)
	if s.Interval {
		b.WriteString("\t\tflags interval\n")
	}
	if list := t.elementTexts(name, have); len(list) > 0 {
		fmt.Fprintf(b, "\t\telements = { %s }\n", strings.Join(list, ", "))
	}
	b.WriteString("\t}\n\n")
}

func (t table) elementTexts(name setName, have members) []string {
	var list []string
	for m, value := range have {
		list = append(list, shapeOf(name, t.v6).text(m, value))
	}
	slices.Sort(list)
	return list
}

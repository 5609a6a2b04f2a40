package firewall

import (
	"fmt"
	"strings"
)

// text shows the tables that the networks lead to, in the words of `nft list`:
// ip and then ip6. foreign are the names of other container networks' bridges.
func text(networks []Network, foreign []string) string {
	var b strings.Builder
	for _, v6 := range []bool{false, true} {
		r := newRuleset(v6)
		for _, n := range networks {
			r.put(n)
		}
		r.setForeignBridges(foreign)
		newTable(v6).write(&b, r.elements)
	}
	return b.String()
}

func (t table) write(b *strings.Builder, e elements) {
	fmt.Fprintf(b, "table %s %s {\n", t.keyword, TableName)
	for _, name := range setNames() {
		s := t.set(nil, name)
		fmt.Fprintf(b, "\tset %s {\n\t\ttype %s\n", name, s.KeyType.Name)
		if s.Interval {
			b.WriteString("\t\tflags interval\n")
		}
		if len(e[name]) > 0 {
			list := e[name].sorted()
			for i, m := range list {
				list[i] = memberText(name, m)
			}
			fmt.Fprintf(b, "\t\telements = { %s }\n", strings.Join(list, ", "))
		}
		b.WriteString("\t}\n\n")
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

func memberText(name setName, m string) string {
	switch name {
	case setSources:
		return m
	case setSame:
		return fmt.Sprintf("%q . %q", m, m)
	default:
		return fmt.Sprintf("%q", m)
	}
}
